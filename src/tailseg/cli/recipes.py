"""The `tailseg recipes` commands: list, show and compare them."""

from __future__ import annotations

import typer

from tailseg.cli.console import RecipeArgument, SetOption, say

recipes_app = typer.Typer(help="List, show and compare recipes.", invoke_without_command=True)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """List the built-in recipes, those of Table 2 as a ladder: what each row adds, costs and scored in the report."""
    from tailseg.recipes.ladder import REPORT, ladder_lines
    from tailseg.recipes.resolve import BUILT_IN

    ladder = [f"table2/{row}" for row in REPORT]
    for name, function in BUILT_IN.items():
        if name not in ladder:
            say(f"{name:28}{(function.__doc__ or '').splitlines()[0]}")
    say("\nTable 2 of the report, each row the one before and one thing more:\n")
    for line in ladder_lines():
        say(line)


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument, settings: SetOption = None) -> None:
    """Print a complete recipe as YAML."""
    from tailseg.recipes.resolve import resolve
    from tailseg.recipes.values import to_yaml

    typer.echo(to_yaml(resolve(recipe, settings or ())), nl=False)


@recipes_app.command("diff")
def recipes_diff(
    one: RecipeArgument,
    other: RecipeArgument,
) -> None:
    """Print the settings in which two recipes differ."""
    from tailseg.recipes.resolve import resolve
    from tailseg.recipes.values import diff

    for key, before, after in diff(resolve(one), resolve(other)):
        say(f"{key}: {before} -> {after}")
