"""A small voice bot, and the A/B measurement of what prefetching does to its first audio.

To copy from: `agent` (retrieval and answer) and `handler` (one turn of a call). What stands in for
Asterisk, the language model and speech synthesis is in `stand_ins`; `experiment`, `measuring` and
`report` are the measurement. ``python -m examples.voice_bot`` runs it.
"""
