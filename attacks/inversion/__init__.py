"""Gradient inversion: images from the updates of honest training, by an operator who only looks.

What is known of an update (:mod:`.evidence`: how the site trained, :mod:`.unroll`; which labels, :mod:`.labels`; in which order,
:mod:`.order`; where that is not granted it is found by :mod:`.tournament`) is first
inverted exactly where the architecture allows it (:mod:`.exact`), else searched for (:mod:`.matching`). A search is composed
(:mod:`.plan`) of an objective (:mod:`.objective`) that looks through what altered the update (:mod:`.channel`), regularisers
(:mod:`.regularisers`), a first trial (:mod:`.start`) and an optimiser (:mod:`.search`); :mod:`.problems` runs many at once.
"""
