"""python -m mezzotint"""

from .cli.app import app

app()
