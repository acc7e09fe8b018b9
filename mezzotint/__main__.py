"""python -m mezzotint"""

from .cli import app

app()
