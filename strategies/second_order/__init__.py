"""Second-order server updates: FAGH (arXiv 2403.11041), SOFIM (arXiv 2403.02833) and what they are measured against.

The maths needs torch only and works on flat vectors: :mod:`.moments`, :mod:`.rank_one`, :mod:`.limited_memory`,
:mod:`.metric`, :mod:`.damping` and :mod:`.sofim` are functions and small states, :mod:`.updates` and :mod:`.rank_k` put
them together to one server step a round. The Flower strategies on top of them are in :mod:`.strategies`.
"""
