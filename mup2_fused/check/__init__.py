"""Does SAM reach every layer of my network at every width? `python -m mup2_fused.check module:factory` measures it.

factory(width) returns the model, or (model, loss) with loss(model) a scalar on fixed data. Without a loss, the data are
random. The model is built at each width and takes a few SAM steps. In the last step the check measures, for every
parameter, by what power of the width these quantities grow:

    init          standard deviation of its initial weights (muP: 0 input, -1/2 hidden, -1 output)
    update        change of its module's output by its update
    perturbation  change of its module's output by its perturbation e
    norm share    its part s ||T g|| of the joint norm ||v||

In muP² the powers of update and perturbation are 0: no layer stands still, and none blows up as the network gets wider.
Both changes are the rms over samples and coordinates of f(w + change, x) - f(w, x). Here f is the module that owns the
parameter, and x its input in the network, which is perturbed for the perturbation. The last row is the same for the
output of the whole network.

Without --groups, the model gets mup2_fused.param_groups with the narrowest width as base, and mup2_fused.init_ with
output weights of zero, because random outputs at the start change the errors in a way that depends on the width. A
power far from 0 then means that a role is wrong, or that muP does not make this model alike at all widths.
--groups module:function checks your own groups and initial weights: function(model) returns the groups for SAM. They
are compared with muP² groups on the same model, so that powers which small networks have anyway cancel.

--ascent momentum measures the perturbation by the base optimizer's first moment, after the steps in which it forms.
SGD has momentum 0.9 then. An interval between SAM steps, or a first pass on a part of the batch, changes none of these
powers, and needs no check of its own.

Models of the mup package are recognized if the factory calls mup.set_base_shapes. If something is wrong, the check
names the layer and says what to change, and the exit status is 1.
"""

from mup2_fused.check.judge import Row, Slope
from mup2_fused.check.measure import QUANTITIES, WHOLE, measure
from mup2_fused.check.report import Report, plot
from mup2_fused.check.run import check

__all__ = ["QUANTITIES", "WHOLE", "Report", "Row", "Slope", "check", "measure", "plot"]
