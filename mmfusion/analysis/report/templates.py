"""How the HTML templates beside this file are read."""

from pathlib import Path

import jinja2


def template_environment() -> jinja2.Environment:
    """Returns an environment that escapes values, and that refuses a name without a value."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
