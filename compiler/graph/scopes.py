"""Names that say where a node is: the path of its module and its operation, `down_blocks.0/resnets.1/conv1/Conv`.

torch's exporter calls nodes `node_conv2d_17` and notes the modules that each came from. Slashes divide the modules that
call one another, as torch's older exporter wrote it (there with one more in front), so that viewers fold a graph into
its modules, and a layer that a report names can be found in the model's source. Values keep their names: each stands in
the file as often as it is read.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
SEPARATOR = "/"
TABLES_SCOPE = "tables"  # where the rows of the timestep are looked up
CONSTANTS_SCOPE = "constants"  # where weights and tables are unpacked


def scope_of(node: ir.Node) -> str:
    """The path of the modules that a node is in; empty for one at the top, or in a model that does not tell."""
    return (node.name or "").rpartition(SEPARATOR)[0]


def within(scope: str, name: str) -> str:
    """A name inside a scope; one that is inside already stays as it is."""
    prefix = f"{scope}{SEPARATOR}" if scope else ""
    return name if name.startswith(prefix) else prefix + name


def name_by_module(graph: ir.Graph) -> int:
    """Name the nodes that the exporter noted modules of; returns how many. Others keep their names, if they are unique.

    The module that all nodes lie in has nothing to say and is left out.
    """
    noted = {node: modules for node in graph if (modules := _modules(node)) is not None}
    roots = {modules[0] for modules in noted.values() if modules}
    taken = {node.name for node in graph if node not in noted}
    for node, modules in noted.items():
        path, inside = [], ""
        for module in modules:
            path.append(module.removeprefix(f"{inside}.") if inside else module)
            inside = module
        wish = within(SEPARATOR.join(path[1:] if len(roots) == 1 else path), node.op_type)
        name, k = wish, 1
        while name in taken:
            name, k = f"{wish}_{k}", k + 1
        taken.add(name)
        node.name = name
    return len(noted)


def _modules(node: ir.Node) -> list[str] | None:
    """The dotted names of the modules around a node, from the outermost; None where the exporter told of none."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, ""))
    except (SyntaxError, ValueError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not all(isinstance(scope, str) for scope in scopes):
        return None
    # The last one is the call in the FX graph; the model itself has no name. Sizes that torch traced have no module.
    return [scope for scope in scopes[:-1] if scope] if scopes[0] == "" else []
