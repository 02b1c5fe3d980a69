"""The commands of `bertfast`, a file or a package each; cli.py has their options."""
