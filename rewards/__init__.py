"""Rewards: from the text of a completion to numbers in a stated range.

`rewards.parse` (host, standard library and NumPy) turns completions into fixed-shape answers.
`rewards.format`, `rewards.choice` and `rewards.temporal` (JAX) score one component each, and
`rewards.dual` adds them up, weighed by `rewards.weights`. Import from those modules: nothing is
loaded here, so that parsing never pulls in JAX.
"""
