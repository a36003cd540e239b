"""Training: adapters or all weights on a person's own data (`finetune`), and whole models from nothing (`train`).

data.py       lines of text, prompts, chats or pairs, checked one by one
rendering.py  a line as tokens, and which of them are to be learned
batches.py    rows side by side in one flat array, in few shapes
forward.py    such an array through the layers, each row seeing itself alone
loss.py       cross entropy in pieces, z-loss, preferences
optimizer.py  AdamW, the schedule, clipping
steps.py      gradients of a step's rows, and the step
loop.py       the run: steps, validation, stopping, interruption and resuming
"""
