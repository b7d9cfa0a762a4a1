"""Random layers beside stock torch: where is a layer slower that no benchmark's grid has?

``python -m bench.sweep`` draws single layers, gated layers and chains of layers of random sizes, as many as the time
allows. It times each beside stock torch, and times those that lose again for longer. It prints those that lose both
times, with their plans, and a summary by kind, dtype and mode. Results of another formula are refused: each subject is
first compared with float64.
"""
