"""The public HTTP API, OpenAI's and Anthropic's, over whatever `backend.Backend` is behind it.

One request goes through these modules in this order:

    app.py          routes, middleware, admission; the only module that knows all others
    requests.py     what a body may contain (pydantic); unsupported.py: fields we must refuse;
                    constraints.py: forms of answers; tool_requests.py: tools
    responses_requests.py  anthropic_requests.py     the same conversation in other words: to a chat
    prompts.py      messages and prompts to token ids, long ones on a thread
    reading/        how an answer is read, and the grammar it is held to (grammars.py)
    sampling.py     fields to `SamplingParams`, checked against the model
    generations.py  starts one generation per prompt, merges their deltas, cancels them
    sample.py       one sample's tokens to text: decoder, stop strings, log-probabilities   (pure)
    chat.py  completions.py  responses_format.py  anthropic_messages.py
                    text to the objects and events that each endpoint sends                 (pure)
    complete.py     the two ways to answer: one object, or server-sent events (sse.py)

`errors.py` is how anything that goes wrong looks to a client. `info.py` has the small endpoints,
`openapi.py` the document about all of them, `responses.py` and `translated_answers.py` the models
that it describes answers with. `cors.py` is for pages of other origins.
"""
