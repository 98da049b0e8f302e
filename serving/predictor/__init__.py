"""The predictor: KServe's model server around one release, with OpenAI's chat API beside KServe's own protocols.

__main__   the command line and the process      loading      from a folder or s3:// to a proved, loaded release
front      headers, body limit, clients gone     openai       OpenAI's chat API (its documents: documents)
kserving   KServe's V1 and V2                     plane        from what is asked to the model's tensors
engine     the queue and its batches             generation   one batch of the model; text: tokens as text
"""
