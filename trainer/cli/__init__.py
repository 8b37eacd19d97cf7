"""The `modsquad` command, one module per group of subcommands."""
