"""Stand-ins for the model files of the papers: the same names, signatures and return values.

``from fastmim.compat import models_mae`` replaces the authors' ``import models_mae``. Written from
the published interfaces; the code is this library's.
"""
