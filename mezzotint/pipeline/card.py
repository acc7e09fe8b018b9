"""README.md of a compiled pipeline: what is in it, how near each network is to the float one, how it is used."""

from __future__ import annotations

from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.bundle.pipeline import PipelineManifest
from mezzotint.runtime.visible import one_line


def component_rows(manifest: PipelineManifest) -> list[tuple[str, ...]]:
    """Return (folder, class, form, size, layers, SQNR) of each component, for display."""
    return [
        (
            name,
            entry.class_name,
            entry.form,
            f"{entry.bytes / 1e6:.2f} MB",
            f"{entry.integer} integer, {entry.floating} float",
            ", ".join(f"{output} {db:.1f} dB" for output, db in entry.sqnr_db.items()),
        )
        for name, entry in manifest.components.items()
    ]


COMPONENT_COLUMNS = ("folder", "class", "form", "size", "layers", "SQNR beside torch")


def pipeline_card(manifest: PipelineManifest, denoiser: Manifest, name: str) -> str:
    """Return the text of the card."""
    recipe = denoiser.recipe.name
    fields = {key: value for key, value in denoiser.card.items() if key == "license"}
    front = [f"license: {fields.get('license', 'unknown')}", "library_name: mezzotint", "tags: [mezzotint, onnx]"]
    rows = [COMPONENT_COLUMNS, ("---",) * len(COMPONENT_COLUMNS), *component_rows(manifest)]
    table = "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)
    data = "\n".join(f"- {slot}: {entry.data}" for slot, entry in manifest.components.items())
    left_out = "\n".join(f"- {slot}: {_plain(reason)}" for slot, reason in manifest.left_out.items()) or "- nothing"
    more = "".join(f", {name}={value}" for name, value in manifest.call.items())
    control = CONTROLNET in manifest.components
    flag, image = (" --control-image edges.png", ", image=edges") if control else ("", "")
    edges = '\nfrom PIL import Image\n\nedges = Image.open("edges.png").convert("RGB")' if control else ""
    head = "\n".join(["---", *front, "---"])
    return f"""{head}

# {_plain(name)}, a compiled pipeline ({_plain(manifest.class_name)})

The denoiser, in `{manifest.denoiser}/`, is a Mezzotint bundle of recipe `{recipe}`, made for {denoiser.deployment}; its
own card is there. The other networks are ONNX files beside it:

{table}

The ratio (SQNR) is that of the finished file to the float network in torch, each output by itself. Errors of a prompt
are relative to each of its tokens, so that no loud one hides the others. Data of calibration and measurement:

{data}

Left out of the source:

{left_out}

## Use

```text
mezzotint sample . --prompt "a lighthouse"{flag} -o image.png
```

```text
from mezzotint.diffusers import load{edges}

pipe = load(".")
pipe("a lighthouse"{image}, num_inference_steps={denoiser.deployment.steps}{more}).images[0].save("image.png")
```
"""


def _plain(text: object) -> str:
    """Return a text of the source in Markdown: one line, without HTML and without bars of a table."""
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
