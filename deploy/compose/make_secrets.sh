#!/bin/sh
# Makes what compose.yaml mounts as secrets, unless it is there already:
#   secrets/api_keys                 who may ask: "prometheus" and one client; more lines may be added while it runs
#   secrets/metrics_key              the key of "prometheus", for its scrapes
#   secrets/grafana_admin_password
# The folder is for its owner alone. The files in it are readable by all, because each container reads its own under a
# user that this machine does not know.
set -eu
cd "$(dirname "$0")"

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

mkdir -p secrets
chmod 700 secrets
umask 022
[ -s secrets/metrics_key ] || random >secrets/metrics_key
[ -s secrets/grafana_admin_password ] || random >secrets/grafana_admin_password
[ -s secrets/api_keys ] || printf 'prometheus:%s\nclient:%s\n' "$(cat secrets/metrics_key)" "$(random)" >secrets/api_keys
echo "Clients send:  Authorization: Bearer $(sed -n 's/^client://p' secrets/api_keys)"
echo "Grafana:       admin, $(cat secrets/grafana_admin_password)"
