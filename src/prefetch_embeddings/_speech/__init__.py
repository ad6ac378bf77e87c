"""What `UtterancePrefetcher` is made of: a mailbox, a record of each utterance, who was served."""
