"""Gradient inversion: images from the updates of honest training, by an operator who only looks.

An attack here is a composition: what a trial's update is compared by (:mod:`.objective`), what is known of images
(:mod:`.regularisers`), which labels (:mod:`.labels`), how the site trained (:mod:`.unroll`), how the search goes
(:mod:`.search`).
"""
