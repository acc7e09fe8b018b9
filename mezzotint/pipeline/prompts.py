"""Prompts that components are calibrated and measured on; written for this project."""

from __future__ import annotations

CALIBRATION_PROMPTS = (
    "a lighthouse on a cliff at dusk, waves below",
    "a bowl of oranges on a blue tablecloth, morning light",
    "portrait of an old fisherman with a grey beard",
    "a red bicycle leaning on a brick wall",
    "snowy mountains behind a frozen lake, wide angle",
    "a cat asleep on a stack of books",
    "an empty train station at night, long exposure",
    "watercolor of a garden with sunflowers",
    "a robot made of wood repairing a clock",
    "close-up of a bee on a purple flower",
    "a market street in the rain, umbrellas, reflections",
    "pencil sketch of a sailing ship",
    "a child flying a kite on a beach",
    "isometric drawing of a small castle",
    "a glass of water with a slice of lemon",
    "a fox in a birch forest, autumn leaves",
)
HELD_OUT_PROMPTS = (
    "a wooden bridge over a narrow river, fog",
    "still life with pears and a copper kettle",
    "a yellow taxi in front of a cinema",
    "an astronaut reading a newspaper on a bench",
)
