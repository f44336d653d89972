"""``python -m llamaslot``: the same as the command ``llamaslot``."""

from llamaslot.cli import main

main()
