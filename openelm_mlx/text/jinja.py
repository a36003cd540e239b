"""Chat templates of both families in Jinja, for other programs such as llama.cpp and LM Studio.

This library renders conversations itself (chat.py, harmony.py) and does not use them.
"""

from __future__ import annotations

# The space is the one that Llama's tokenizer adds before a text; gguf_vocabulary.py says why it is in the template.
OPENELM_INSTRUCT = (
    "{{- bos_token + ' ' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)

# Without tools. A source's own template, such as OpenAI's, is preferred to this one.
HARMONY = (
    "{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n"
    "Knowledge cutoff: 2024-06\\n' -}}"
    "{%- if strftime_now is defined -%}{{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' -}}{%- endif -%}"
    "{{- '\\nReasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') + '\\n\\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' -}}"
    "{%- set ns = namespace(instructions='', opening=true) -%}"
    "{%- for message in messages -%}"
    "{%- set instructs = message['role'] == 'system' or message['role'] == 'developer' -%}"
    "{%- if ns.opening and instructs -%}"
    "{%- set ns.instructions = ns.instructions + ('\\n\\n' if ns.instructions else '') + message['content'] -%}"
    "{%- endif -%}"
    "{%- if ns.opening and (loop.last or not instructs) and ns.instructions -%}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + ns.instructions + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- if not (ns.opening and instructs) -%}"
    "{%- set ns.opening = false -%}"
    "{%- if instructs -%}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}"
    "{{- '<|start|>user<|message|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
