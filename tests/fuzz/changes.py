"""What becomes of a drawn model between two calls, as lines of a function change(model)."""

import re

from hypothesis import strategies as st

# m: any child; c, n, r: a convolution, a norm, a ReLU, where the model has one. patch: see twins
OF_CHILDREN = {
    "c": (
        "{c} = nn.Conv2d(4, 4, 1).to(model.dtype)", "{c}.weight = nn.Parameter(2 * {c}.weight.detach())",
        "weight = {c}.weight.detach().clone()\ndel {c}.weight\n{c}.weight = weight",
        "{c}.padding_mode = 'circular'", "{c}.stride = (2, 2)", "{c}.weight.requires_grad_(False)",
        "torch.nn.utils.parametrize.register_parametrization({c}, 'weight', nn.Tanh())", "{c}.groups = 4",
        "torch.nn.utils.prune.l1_unstructured({c}, 'weight', 0.5)", "{c} = nn.Sequential({c}, nn.Tanh())",
        "{c}.bias = None", "{c}.float()", "{c}.weight.data = 2 * {c}.weight.data",
        "patch(nn.Conv2d, 'forward', doubled(nn.Conv2d.forward))",
        "patch(nn.Conv2d, '_conv_forward', doubled(nn.Conv2d._conv_forward))",
    ),
    "n": (
        "{n} = nn.BatchNorm2d(4).to(model.dtype)", "{n} = nn.Identity()", "{n}.eval()", "{n}.momentum = None",
        "{n}.momentum = 0.5", "{n}.eps = 0.1", "{n}.running_mean = None", "{n}.track_running_stats = False",
        "{n}.weight = None", "{n} = nn.SyncBatchNorm.convert_sync_batchnorm({n})", "{n} = nn.GroupNorm(2, 4).double()",
        "{n}.running_mean = {n}.running_mean.clone()", "{n}.reset_running_stats()", "{n}.requires_grad_(False)",
        "patch(nn.BatchNorm2d, 'forward', doubled(nn.BatchNorm2d.forward))", "{n}.train()",
        "patch(nn.modules.batchnorm._BatchNorm, 'forward', doubled(nn.BatchNorm2d.forward))",
    ),
    "r": (
        "{r} = nn.Tanh()", "{r}.inplace = not getattr({r}, 'inplace', False)",
        "patch(nn.ReLU, 'forward', doubled(nn.ReLU.forward))", "{r} = nn.LeakyReLU(0.1)",
    ),
    "m": (
        "{m}.register_forward_hook(lambda module, inputs, y: 2 * y)", "{m}.on = True", "{m}.eval()", "{m}.train()",
        "{m}.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))", "del {m}", "{m} = nn.Identity()",
        "{m}.register_full_backward_hook(lambda module, gradients, _: (2 * gradients[0],))", "{m}.flag = False",
        "{m}.forward = lambda x, z=None: 2 * x", "{m} = copy.deepcopy({m})", "{m}.scale = 3.0",
        "patch(type({m}), 'forward', doubled(type({m}).forward))", "{m}.register_buffer('scale', torch.ones(()))",
        "patch(type({m}), '__call__', doubled(type({m}).__call__))", "{m} = None",
    ),
}  # fmt: skip
OF_ALL = (
    "model.extra = nn.Conv2d(4, 4, 1).to(model.dtype)", "model.scale = 3.0", "model = copy.deepcopy(model)",
    "model = pickle.loads(pickle.dumps(model))", "model.register_buffer('scale', torch.ones(4, 1, 1))",
    "patch(Net, 'forward', doubled(Net.forward))", "patch(Net, 'scale', 2.0)",
    "Net.forward.__code__ = (lambda self, x, z=None: 2 * x).__code__",
    "model.forward = lambda x, z=None: 2 * x", "patch(F, 'relu', torch.tanh)", "model.requires_grad_(False)",
    "model.scale = nn.Parameter(torch.ones(()))", "model.float()",
    "model.register_forward_hook(lambda module, inputs, y: None)", "model = copy.copy(model)", "model.zero_grad()",
    "model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})",
    "patch(nn, 'BatchNorm2d', nn.GroupNorm)", "model.share_memory()",
)  # fmt: skip
# by a name in the text
OF_TEXT = {
    r"self\.flag": ("model.flag = not model.flag", "del model.flag", "Net.flag = 0\ndel model.flag", "model.flag = ()"),
    r"self\.alpha": ("model.alpha = 2.0", "model.alpha = torch.full((), 2.0)", "model.alpha = 1"),
    r"self\.steps": ("model.steps[0] = 3.0", "model.steps = []", "model.steps.append(2.0)", "model.steps = (1.0, 0.5)"),
    r"self\.options": ("model.options['by'] = 2.0", "model.options = {}"),
    r"self\.nothing": ("model.nothing = nn.ReLU()", "model.nothing = 1", "model.nothing = torch.ones(())"),
    r"self\.gain": ("model.gain = nn.Parameter(2 * model.gain.detach())", "model.gain.data.mul_(2)"),
    r"\.kind": ("model.kind = 2", "Net.kind = 2", "patch(Net, 'kind', property(lambda self: 2))"),
    r"\.factor": ("Net.factor = 3.0", "Net.factor = property(lambda self: 3.0)", "model.__dict__['factor'] = 3.0"),
    r"\.helped": ("Net.helped = lambda self, y: y + 1", "model.helped = lambda y: y + 1"),
    r"\bSWITCH": ("global SWITCH\nSWITCH = not SWITCH", "global SWITCH\ndel SWITCH", "global SWITCH\nSWITCH = [1]"),
    r"\bSettings": (
        "Settings.more = 1", "Settings.on = True", "Settings.on = []", "global Settings\nSettings = model",
        "del Settings.on",
    ),
    r"\bCONFIG": ("CONFIG['by'] = 2.0", "CONFIG.clear()", "global CONFIG\nCONFIG = {'by': 3.0}"),
    r"\bFACTORS": ("FACTORS[1] = 5.0", "FACTORS.clear()", "global FACTORS\nFACTORS = (1.0, 3.0)"),
    r"\bhelper": (
        "helper.__defaults__ = (3.0,)", "helper.__kwdefaults__ = {'on': False}", "global helper\nhelper = torch.tanh",
        "helper.__kwdefaults__['on'] = 0", "helper.__code__ = (lambda y, by=2.0, on=True: y * 3).__code__",
    ),
    r"\bclosed": ("closed.__closure__[0].cell_contents = 3.0", "global closed\nclosed = make(2.0)"),
    r"PLACE": ("PLACE.by = 3.0", "del PLACE.by", "PLACE.by = True"),
    r"PARTIAL": ("PARTIAL.keywords['other'] = 3.0", "global PARTIAL\nPARTIAL = torch.tanh"),
    r"ACTS": ("ACTS.reverse()", "ACTS[1] = torch.sigmoid"),
    r"scale": ("model.scale = 4.0", "Net.scale = 4.0", "model.scale = torch.full((), 4.0)"),
    r"globals": ("global FACTOR\nFACTOR = 3.0",),
    r"isinstance|type|is self|== self": (
        "model.norm0 = nn.Identity()", "model.norm0 = model.norm1", "model.norm1 = nn.InstanceNorm2d(4)",
        "model.norm0.weight = model.norm1.weight", "model.relu0 = nn.Identity()",
    ),
    r"\bAsks": ("Asks.on = True", "patch(Asks, 'forward', doubled(Asks.forward))"),
    r"ModuleList": (
        "for child in model.children():\n    if isinstance(child, nn.ModuleList):\n        child.append(nn.Tanh())",
        "for child in model.children():\n    if isinstance(child, nn.ModuleList):\n        del child[-1]",
        "for child in model.children():\n    if isinstance(child, nn.ModuleList):\n        child[0] = nn.Tanh()",
    ),
    r"class Child": ("Child0.forward = lambda self, x, z=None: 2 * x", "model.child0 = Child0().to(model.dtype)"),
}  # fmt: skip


@st.composite
def changes(draw, members: list[tuple[str, str]], text: str) -> list[str]:
    """One or two changes of a model with these children, whose source is `text`."""
    return [draw(_change(members, text)) for _ in range(draw(st.sampled_from([1, 1, 2])))]


@st.composite
def _change(draw, members, text):
    children = {letter: _paths(members, kinds) for letter, kinds in _KINDS.items()}
    tables = [(letter, OF_CHILDREN[letter]) for letter in children if children[letter]]
    tables += [("", table) for name, table in OF_TEXT.items() if re.search(name, text)] * 2
    letter, table = draw(st.sampled_from([*tables, ("", OF_ALL)]))
    line = draw(st.sampled_from(table))
    return line.format(**{letter: draw(st.sampled_from(children[letter]))}) if letter else line


_KINDS = {"c": "Conv2d", "n": "BatchNorm2d", "r": "ReLU", "m": ""}


def _paths(members, kind):
    """How the children of a kind are reached from `model`."""
    found = []
    for name, made in members:
        holder = re.match(r"nn\.(Sequential|ModuleList)\(\[?(.*?)\]?\)$", made)
        if holder is None:
            found += [f"model.{name}"] if f"nn.{kind}" in made or not kind else []
            continue
        items = re.split(r", (?=nn\.|self\.)", holder[2])
        found += [f"model.{name}[{i}]" for i, item in enumerate(items) if f"nn.{kind}" in item or not kind]
    return found
