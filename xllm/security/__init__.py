"""Who may do what: keys, secrets, proofs, limits. docs/security.md says what each protects.

    files.py        reads files that only their owner should be able to read
    bearer.py       keys that requests present
    api_keys.py     who may use the public API, and how much
    rate_limit.py   buckets of requests and tokens
    secret.py       the cluster's secret, and the keys derived from it
    seal.py         records in etcd that carry a proof
    tls.py          contexts for listeners and clients

Without the flags of this concern nothing here changes what a process does.
"""
