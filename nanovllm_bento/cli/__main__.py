from nanovllm_bento.cli import main

if __name__ == "__main__":
    main()
