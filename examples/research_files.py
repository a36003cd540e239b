"""A research assistant over local files: it searches and reads as gpt-oss's browser does, answers, and cites a line.

    python examples/research_files.py [QUESTION [FOLDER [MODEL]]]

The citation is held to lines that were shown, so it can always be looked up. With the demo it is no more than that: the demo
knows a dictionary and has never read a file. Try it with openai/gpt-oss-20b.
"""

import re
import sys
from pathlib import Path

import openelm_mlx as om
from openelm_mlx.tools import FileBrowser

HERE = Path(__file__).parent
QUESTION, FOLDER, MODEL = [*sys.argv[1:], *["What does seed do?", str(HERE), "demo-gpt-oss"][len(sys.argv) - 1 :]]

model, tokenizer = om.load(MODEL)
browser = FileBrowser(FOLDER, count_tokens=lambda text: len(tokenizer.encode(text)))
browser.search(QUESTION)
if not browser.pages[0].links:
    sys.exit("No file has a word of the question.")
shown = browser.open(0, num_lines=12)
lines = [int(number) for number in re.findall(r"^L(\d+): .*\S", shown, re.MULTILINE)]
prompt = f"{QUESTION} Answer from this file, and cite the line that says so.\n\n{shown}"
citation = f"【1†L({'|'.join(map(str, lines))})】"
answer = om.generate(model, tokenizer, prompt, regex=f"[A-Za-z ,;'()-]{{1,120}}[.] {citation}", max_tokens=200)

cited = int(re.findall(r"L(\d+)】$", answer)[0])
print(answer)
print(f"{browser.pages[1].location}, line {cited}: {browser.pages[1].lines[cited].strip()}")
