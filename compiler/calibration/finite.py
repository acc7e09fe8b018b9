"""One image drawn with the float model, before any pass: a model that fails or gives no numbers is named as that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import ModelError
from .calibrate import follow_trajectories


def require_finite(program: Program, context: Context) -> None:
    """Raise ModelError for a float model that does not run, or whose prediction is not finite at some call.

    It costs the deployed sampler's calls for one image, a share of 1 / samples of one pass of calibration.
    """
    output = program.signature.output
    with Executor(program.model, context.folder, threads=context.threads) as executor:

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            try:
                found = np.asarray(executor.call(program.signature, x, t, conditions)[output], np.float32)
            except MezzotintError:
                raise
            except Exception as error:  # onnxruntime's errors have no common base
                line = (str(error).splitlines() or [""])[0][:300]
                raise ModelError(
                    f"the model cannot run: {line}", where=f"timestep {t:g}", hint="export the model again"
                ) from error
            if bad := found.size - int(np.isfinite(found).sum()):
                latent = "" if np.isfinite(x).all() else "; its sample was not finite either"
                raise ModelError(
                    f"the float model computes NaN or infinite values at timestep {t:g}: {bad} of {found.size} numbers"
                    f"{latent}",
                    where=f"output {output}",
                    hint="check the model in float32, its weights and its scheduler, before quantizing it",
                )
            return found

        follow_trajectories(program, replace(context, samples=1, batch=1), denoiser, "check the float model")
