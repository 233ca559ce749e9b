"""Commands that refuse an option that is given twice where only one of its values would count."""

from __future__ import annotations

from collections import Counter

import click


class OnceOptions(click.Command):
    """A command that refuses an option that is given twice where only one of the values would count."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            self._refuse_twice(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_twice(self, ctx: click.Context, args: list[str]) -> None:
        """Raises UsageError."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(order).items():
            if not isinstance(parameter, click.Option) or times == 1 or parameter.multiple or parameter.count:
                continue
            if parameter.is_flag and not parameter.secondary_opts:
                continue  # it says the same again
            ctx.fail(f"{parameter.opts[0]} is given {times} times, and only one counts: remove all but one")
