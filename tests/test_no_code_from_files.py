"""No file that megagrow reads can run code: what could make it so is not called anywhere."""

import ast

import pytest

from tests.helpers.source_tree import dotted, imports, name_of, tree_of
from tests.test_architecture import PRODUCT, hold

FORBIDDEN = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "runs a text as code"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput"), "goes through a shell"),
    **dict.fromkeys(("torch.jit.load", "torch.hub.load", "runpy.run_path"), "runs a file's code"),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler"), "unpickles"),
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), "makes any object"),
}
"""Calls by which a file that somebody else has written could run code."""

PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def argument(call: ast.Call, name: str) -> object:
    """The constant that a call gives for a keyword; None if it gives none, or no constant."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return given[0].value if given and isinstance(given[0], ast.Constant) else None


def unsafe(call: ast.Call) -> str | None:
    """Return the fault of a call, if files could run code through it."""
    name = dotted(call.func)
    if name == "torch.load" and argument(call, "weights_only") is not True:
        return "unpickles; pass weights_only=True"
    if name.endswith("np.load") and argument(call, "allow_pickle") is not False:
        return "may unpickle; pass allow_pickle=False"
    if name == "yaml.load" and not any(keyword.arg == "Loader" for keyword in call.keywords):
        return "needs a Loader"
    if name.endswith(".from_pretrained") and argument(call, "trust_remote_code") is not False:
        return "may run code beside the files; pass trust_remote_code=False"
    if argument(call, "shell") is True:
        return "goes through a shell"
    return FORBIDDEN.get(name)


def test_no_file_can_run_code() -> None:
    found = []
    for path in PRODUCT:
        found += [
            f"{name_of(path)}: imports {name}"
            for name in imports(path)
            if name.split(".")[0] in PICKLES
        ]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and (problem := unsafe(node)):
                found.append(f"{name_of(path)}:{node.lineno}: {dotted(node.func)} {problem}")
    hold("code", found)


@pytest.mark.parametrize(
    "text",
    [
        *("torch.load(path)", "torch.load(path, weights_only=False)", "eval(text)"),
        *("np.load(path, allow_pickle=True)", "numpy.np.load(path)", "yaml.load(text)"),
        *("A.from_pretrained(name)", "subprocess.run(text, shell=True)", "yaml.full_load(text)"),
    ],
)
def test_calls_that_are_not_safe_are_seen(text: str) -> None:
    assert unsafe(ast.parse(text, mode="eval").body) is not None
