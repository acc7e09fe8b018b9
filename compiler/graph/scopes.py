"""Node names with the path of the module and the operation, such as `down_blocks.0/resnets.1/conv1/Conv`.

torch's exporter names nodes `node_conv2d_17` and records the modules of each in its metadata. The names here separate
nested modules by slashes, like torch's older exporter (which wrote one more in front), so that viewers group a graph by
modules and a layer of a report can be found in the model's source. Values keep their names, because the file repeats
each name at every reader.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
SEPARATOR = "/"
TABLES_SCOPE = "tables"  # of the nodes that look up the rows of the timestep
CONSTANTS_SCOPE = "constants"  # of the nodes that unpack weights and tables


def scope_of(node: ir.Node) -> str:
    """Return the path of the modules that contain a node; empty at the top, or where names have no path."""
    return (node.name or "").rpartition(SEPARATOR)[0]


def within(scope: str, name: str) -> str:
    """Return a name inside a scope. A name that is inside already stays unchanged."""
    prefix = f"{scope}{SEPARATOR}" if scope else ""
    return name if name.startswith(prefix) else prefix + name


def name_by_module(graph: ir.Graph) -> int:
    """Rename the nodes whose modules the exporter recorded, and return their number.

    The other nodes keep their names. A root module that contains all nodes is left out of the path.
    """
    recorded = {node: modules for node in graph if (modules := _modules(node)) is not None}
    roots = {modules[0] for modules in recorded.values() if modules}
    taken = {node.name for node in graph if node not in recorded}
    for node, modules in recorded.items():
        path, inside = [], ""
        for module in modules:
            path.append(module.removeprefix(f"{inside}.") if inside else module)
            inside = module
        preferred = within(SEPARATOR.join(path[1:] if len(roots) == 1 else path), node.op_type)
        name, k = preferred, 1
        while name in taken:
            name, k = f"{preferred}_{k}", k + 1
        taken.add(name)
        node.name = name
    return len(recorded)


def _modules(node: ir.Node) -> list[str] | None:
    """Return the dotted names of the modules around a node, outermost first, or None where none are recorded."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, ""))
    except (SyntaxError, ValueError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not all(isinstance(scope, str) for scope in scopes):
        return None
    # The last scope is the call in the FX graph, and the first, of the model itself, is empty. Traced sizes have none.
    return [scope for scope in scopes[:-1] if scope] if scopes[0] == "" else []
