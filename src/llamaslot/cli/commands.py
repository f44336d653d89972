"""Groups of commands that tell what a word from another program's command line is called here."""

from __future__ import annotations

from importlib import import_module

import click

#: Words that people try, and what to type instead, by group.
_SYNONYMS = {
    "main": {
        "version": "llamaslot --version",
        "help": "llamaslot --help",
        "start": "llamaslot serve",
        "check": "llamaslot serve --check",
    },
    "keys": {
        "list": "llamaslot keys ls",
        "create": "llamaslot keys add NAME",
        "new": "llamaslot keys add NAME",
        **dict.fromkeys(("remove", "delete", "revoke"), "llamaslot keys rm NAME"),
    },
    "snapshots": {
        "list": "llamaslot snapshots ls",
        "check": "llamaslot snapshots verify",
        "prune": "llamaslot snapshots gc",
        **dict.fromkeys(("remove", "delete"), "llamaslot snapshots rm ID"),
    },
}


#: Options whose value people give as an argument, and how to give it.
_FOR_ARGUMENTS = {"--config": "--config FILE", "--url": "--url URL"}


class Commands(click.Group):
    """A group of commands. A synonym of a command, and an argument that belongs to an option, end with a hint."""

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (meant := _SYNONYMS.get(self.name or "", {}).get(args[0])) is not None:
            context.fail(f"No such command '{args[0]}'. Did you mean '{meant}'?")
        return super().resolve_command(context, args)

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            its = error.ctx
            if its is not None and its.parent is context and "unexpected extra argument" in error.message:
                options = {option for each in its.command.params for option in each.opts}
                if wanted := [usage for option, usage in _FOR_ARGUMENTS.items() if option in options]:
                    meant = f"{error.message}. Did you mean {' or '.join(wanted)}?"
                    raise click.UsageError(meant, its) from None
            raise


class LateGroup(Commands):
    """A group of commands whose module, of the same name, is imported only when the group is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return self._group.list_commands(context)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return self._group.get_command(context, name)

    @property
    def _group(self) -> click.Group:
        group = getattr(import_module(f"{__package__}.{self.name}"), self.name or "")
        assert isinstance(group, click.Group), "a module of commands has a group of its name"
        return group
