"""`python -m trainer.cli`, for launchers that start a module on every rank."""

from trainer.cli.main import main

if __name__ == "__main__":
    main()
