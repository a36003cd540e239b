#!/bin/sh
# Claude Code, run once without a person, in the empty folder $1. Its address and model come from BASE_URL and MODEL.
# Its own first prompt is long, most of it instructions and tools that a small model does not need.
set -eu
cd "$1"
HOME="$1" ANTHROPIC_BASE_URL="$BASE_URL" ANTHROPIC_API_KEY=none ANTHROPIC_MODEL="$MODEL" ANTHROPIC_SMALL_FAST_MODEL="$MODEL" \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 \
  claude -p "What is a harbor?" --output-format json --tools "" --system-prompt "You answer questions." < /dev/null
