"""A small voice bot, and the A/B measurement of what prefetching does to its first audio.

To copy from: `agent` (retrieval and answer) and `handler` (one call: partial and final transcripts,
barge-in, hang-up).

What stands in for Asterisk, the language model and speech synthesis is in `stand_ins`, the caller
and the recogniser in `transcripts`. The measurement: `knowledge` (what is asked, and of which
knowledge base), `arms` (the same bot four times), `measuring` (probes), `experiment`, `report` and
`plots`. ``python -m examples.voice_bot`` runs it.
"""
