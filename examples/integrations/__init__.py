"""Adapters from voice frameworks to an `UtterancePrefetcher`: one file each, made to be copied.

`pipecat_processor` sits in a Pipecat pipeline, `livekit_session` listens to a LiveKit session,
`asterisk_ari` takes the events of an Asterisk ARI client. None of the frameworks is needed by
`prefetch_embeddings` itself.
"""
