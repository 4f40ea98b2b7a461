"""Run a notebook as a script, and stop at the first command that fails: python tests/notebook.py NOTEBOOK"""

import json
import re
import subprocess
import sys
import types
from pathlib import Path


def shell(command: str) -> None:
    print(f"$ {command}", flush=True)
    subprocess.run(command, shell=True, check=True)


notebook = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
# all that a cell takes from a notebook's own Python
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = display = types.ModuleType("IPython.display")
display.HTML = str
names = {"shell": shell}
for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
        # a line that begins with ! is a command, in which {name} is a variable; %pip is pip
        code = re.sub("^[!%](.*)", r"shell(f'''\1''')", "".join(cell["source"]), flags=re.M)
        exec(compile(code, sys.argv[1], "exec"), names)
