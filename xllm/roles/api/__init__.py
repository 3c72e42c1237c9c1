"""The public HTTP API, OpenAI's, over whatever `backend.Backend` is behind it.

One request goes through these modules in this order:

    app.py          routes, middleware, admission; the only module that knows all others
    requests.py     what a body may contain (pydantic); unsupported.py: fields we must refuse
    prompts.py      messages and prompts to token ids, long ones on a thread
    sampling.py     fields to `SamplingParams`, checked against the model
    generations.py  starts one generation per prompt, merges their deltas, cancels them
    sample.py       one sample's tokens to text: decoder, stop strings, log-probabilities   (pure)
    chat.py  completions.py     text to the objects and chunks that OpenAI sends            (pure)
    complete.py     the two ways to answer: one object, or server-sent events (sse.py)

`errors.py` is how anything that goes wrong looks to a client. `info.py` has the small endpoints,
`openapi.py` the document about all of them, `responses.py` the models it describes answers with.
"""
