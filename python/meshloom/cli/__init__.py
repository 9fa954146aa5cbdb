"""The command `meshloom`."""


def main() -> None:
    from meshloom.cli.app import run

    run()
