"""What lm-evaluation-harness's Hugging Face backend (0.4.13) answers, in NumPy: one request at a time, nothing shared.

Rewritten from reading its `TemplateLM._encode_pair`, `HFLM.tok_encode`, `_loglikelihood_tokens`, `loglikelihood_rolling`
and `utils.get_rolling_token_windows`. `logits` is any function from tokens to (L, V).
"""

import numpy as np


class Reference:
    """encode: text -> tokens as the tokenizer does by itself. bare: the same without special tokens."""

    def __init__(self, encode, bare, bos_text, prefix_token, max_length, logits):
        self.encode_default, self.bare, self.bos_text = encode, bare, bos_text
        self.prefix_token, self.max_length, self.logits = prefix_token, max_length, logits

    def tok_encode(self, text):
        if self.bos_text and text.startswith(self.bos_text):
            # Without special tokens added, but the text's own `<s>` is read as the token.
            return [self.prefix_token, *self.bare(text[len(self.bos_text) :])]
        return self.encode_default(text)

    def pair(self, context, continuation):
        """The two lists of tokens, or None where the backend ends with an assertion."""
        if context == "":
            after = self.bare(continuation)
            if not after:
                return None
            if after[0] == self.prefix_token:
                before, after = after[:1], after[1:]
            else:
                before = [self.prefix_token]
        else:
            num_spaces = len(context) - len(context.rstrip())
            if num_spaces:
                context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
            before = self.tok_encode(context)
            whole = self.tok_encode(context + continuation)
            # `before` is what the lengths are counted from, and what is read before the continuation.
            after = whole[len(before) :]
        if not before or not after or len(after) > self.max_length:
            return None
        return before, after

    def score(self, before, after):
        tokens = np.array([*before, *after][-(self.max_length + 1) :])
        rows = self.logits(tokens[:-1].tolist())[-len(after) :].astype(np.float64)
        logprobs = rows - rows.max(-1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
        chosen = logprobs[np.arange(len(after)), after]
        return float(chosen.sum()), bool((logprobs.argmax(-1) == after).all())

    def rolling(self, text):
        tokens = self.tok_encode(text)
        total, done = 0.0, 0
        while done < len(tokens):
            if done == 0:
                count = min(self.max_length, len(tokens))
                inputs = [self.prefix_token, *tokens[: count - 1]]
            else:
                count = min(len(tokens) - done, self.max_length)
                inputs = tokens[done + count - self.max_length - 1 : done + count - 1]
            predicted = tokens[done : done + count]
            before = inputs[: len(inputs) - (len(predicted) - 1)]
            total += self.score(before, predicted)[0]
            done += count
        return total
