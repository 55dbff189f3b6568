"""`python -m tinychat` is the `tinychat` command."""

from tinychat.cli.app import main

if __name__ == "__main__":
    main()
