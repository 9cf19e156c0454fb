"""Faults of fuse_ and fold_bn_: a guard that does not look, an effect that is missed, a state that is not put back."""

from .mutant import Mutant

TRUTH = "tests/surgery"


def _fault(name, file, old, new, test):
    return Mutant(name, f"rir_kernels/surgery/{file}.py", old, new, (f"{TRUTH}/{test}",))


def _effect(name, old, new, case, file="effects"):
    return _fault(f"effects: {name}", file, old, new, f"test_side_effects.py::test_noticed[{case}]")


def _use(name, file, old, new, case):
    return _fault(f"fold: {name}", file, old, new, f"test_fold_bn_uses.py::test_other_uses_are_noticed[{case}]")


EFFECTS = [
    _effect("views are fresh", "{node} | (self.given(node.all_input_nodes) if views else set())", "{node}", "weight"),
    _effect(
        "unknown children write nothing", "return _Effect(True, True, tuple", "return _Effect(False, True, tuple",
        "view_by_index",
    ),
    _effect(
        "unknown children return no views", "return _Effect(True, True, tuple", "return _Effect(True, False, tuple",
        "view_by_unknown_child",
    ),
    _effect("schemas not asked", "written += _written_by_schema(overload._schema, node)", "pass", "custom_op"),
    _effect(
        "children in place", 'any(getattr(m, "inplace", False) is not False for m in module.modules())', "False",
        "in_place_child",
    ),
    _effect(
        "functions of others", "return node.all_input_nodes\n    written", "return []\n    written",
        "wrapped_function",
    ),
    _effect("in place by keyword", 'return node.kwargs["inplace"] is not False', "return False", "function_in_place"),
    _effect(
        "hooks of others", "return known and not bypass_obstacle(module, type(module))", "return known",
        "hooked_child",
    ),
    _effect(
        "statistics read in between", "changed & memory.used(node)", "changed & memory.written(node)",
        "read_statistics", "matching",
    ),
    _effect("writes in between", "elif read & memory.written(node):", "elif False:", "two_views", "matching"),
    _effect("statistics handed in", "if handed & changed", "if False", "statistics_as_residual", "matching"),
    _fault(
        "effects: arguments apart", "effects", "return frozenset([_ARGUMENTS])", "return frozenset([node])",
        "test_side_effects.py::test_two_arguments_may_be_one_tensor",
    ),
    _fault(
        "effects: everything is written to", "effects", 'return name.endswith("_") or _asks_for_in_place(node)',
        "return True", "test_side_effects.py::test_unnoticed[cat_along_1]",
    ),
]  # fmt: skip
READS = [
    _fault(
        "absent: not asked again", "reads", "return not has(module, name)", "return True",
        "test_absent_attributes.py::test_added_afterwards",
    ),
    _fault(
        "absent: on the class", "reads", " or hasattr(type(module), name)", "",
        "test_absent_attributes.py::test_added_to_the_class_afterwards",
    ),
    _fault(
        "absent: __getattr__ of others", "reads", "    if own is not nn.Module:", "    if own is None:",
        "test_absent_attributes.py::test_class_with_its_own_getattr",
    ),
    _fault(
        "reads: children of a list", "reads", "return tuple(module._modules) == found.names", "return True",
        "test_containers.py::test_changes_of_a_list_are_noticed",
    ),
    _fault(
        "reads: an error that forward catches", "tracer", "return _without_an_answer(super().to_bool, obj)",
        "return super().to_bool(obj)", "test_tracing_side_effects.py::test_a_forward_that_catches[caught]",
    ),
    _fault(
        "aliases: not asked again", "program", "return self.granted.obstacle(module)", 'return ""',
        "test_aliases.py::test_one_name_is_rebound[child-new_conv-0]",
    ),
    _fault(
        "aliases: of children looked into", "granted", "known[found] in looked_into or ", "",
        "test_aliases.py::test_one_name_is_rebound[inlined-new_conv_under_two_names-0]",
    ),
    _fault(
        "aliases: of parameters", "granted", "if id(tensor) in read)", "if False)",
        "test_aliases.py::test_one_name_is_rebound[tied-new_weight-0]",
    ),
    _fault(
        "which: not asked of the code", "by_name", "if not _ASK_WHICH.isdisjoint(code.co_names):", "if False:",
        "test_aliases.py::test_changed_answers[isinstance]",
    ),
    _fault(
        "which: nothing is compared", "by_name", 'step in _COMPARE and before != "LOAD_CONST"', "False",
        "test_aliases.py::test_changed_answers[same weight]",
    ),
    _fault(
        "which: classes of children", "granted", "if class_of(_at(module, name)) is not kind:", "if False:",
        "test_aliases.py::test_changed_answers[isinstance in a list]",
    ),
    _fault(
        "by name: classes", "by_name", "owners += classes", "pass",
        "test_aliases.py::test_changed_answers[super]",
    ),
    _fault(
        "by name: imports", "by_name", "owners = list(_imported(code, names))", "owners = []",
        "test_aliases.py::test_changed_answers[import]",
    ),
    _fault(
        "by name: absent ones", "by_name", "(there is not None or name in asked)", "there is not None",
        "test_aliases.py::test_changed_answers[class, absent]",
    ),
    _fault(
        "by name: of what globals name", "by_name", "for name in code.co_names if name in names) if asked else ():",
        "for name in code.co_names if name in names) if False else ():",
        "test_aliases.py::test_changed_answers[a module's, absent]",
    ),
    _fault(
        "by name: any name", "by_name", "if name in _ANY_NAME and name not in names", "if False",
        "test_untraceable.py::test_refused[globals]",
    ),
    _fault(
        "by name: __dict__", "tracer", 'if path is not None and name == "__dict__" and not is_library(where):',
        "if False:", "test_untraceable.py::test_refused[__dict__]",
    ),
]  # fmt: skip
OUTSIDE = [
    _fault(
        "outside: not asked again", "program", "if not one.holds():", "if False:",
        "test_external_state.py::test_changed_afterwards[BySwitch]",
    ),
    _fault(
        "outside: content of containers", "outside", "isinstance(value, _BY_CONTENT) and _content(value) == found",
        "isinstance(value, _BY_CONTENT)", "test_external_state.py::test_changed_afterwards[ByDict]",
    ),
    _fault(
        "outside: attributes of what globals name", "watch", "value, used = found, used + 1", "value, used = found, 1",
        "test_external_state.py::test_changed_afterwards[ByInstance]",
    ),
    _fault(
        "outside: closures", "watch", "elif route is not None and kind", "elif False and kind",
        "test_external_state.py::test_variable_of_a_closure",
    ),
    _fault(
        "outside: defaults", "watch", "            if taken:", "            if False:",
        "test_external_state.py::test_changed_afterwards[ByDefaults]",
    ),
    _fault(
        "outside: answers of torch", "outside", "value = value(*self.arguments)\n        found",
        "return True\n        found", "test_external_state.py::test_answers_of_torch",
    ),
    _fault(
        "outside: generators", "outside", 'raise Unknown(f"a {type(value).__name__}")', "return value",
        "test_untraceable.py::test_refused[generator]",
    ),
    _fault(
        "outside: methods of generators", "outside", "any(owner is one for one in _WATCHED)", "True",
        "test_untraceable.py::test_refused[its method]",
    ),
    _fault(
        "outside: pickled after a change", "outside", "found = MISSING if self.holds() else _Missing.CHANGED",
        "found = MISSING", "test_external_state.py::test_a_copy_that_is_pickled_after_the_change[ByFunction]",
    ),
]  # fmt: skip
CLASSES = [
    _fault(
        "classes: methods not compared", "classes", "if now != method or", "if False or",
        "test_patched_classes.py::test_a_method_of_the_same_code",
    ),
    _fault(
        "classes: __call__", "classes", "if kind.__call__ is not nn.Module.__call__:", "if False:",
        "test_patched_classes.py::test_methods_replaced_on_a_class[conv, call]",
    ),
    _fault(
        "classes: methods of bases", "classes", "if base is kind or name in vars(base)", "if base is kind",
        "test_patched_classes.py::test_methods_replaced_on_a_class[unit, base]",
    ),
    _fault(
        "classes: patched before", "classes", "m if _is_from(base, m) else object()", "m",
        "test_patched_classes.py::test_a_class_that_was_patched_before_it_was_known",
    ),
    _fault(
        "classes: functions that they call", "classes", "if function is not None:", "if False:",
        "test_patched_classes.py::test_functions_that_torchs_modules_call[relu]",
    ),
    _fault(
        "classes: code that is reloaded", "classes", 'getattr(now, "__code__", None) is not code', "False",
        "test_patched_classes.py::test_code_that_is_reloaded",
    ),
    _fault(
        "outside: code that is reloaded", "outside", 'getattr(value, "__code__", None) is not self.code', "False",
        "test_external_state.py::test_changed_afterwards[ByCode]",
    ),
    _fault(
        "outside: keywords of a partial", "outside", "_BY_CONTENT = (*CONTAINERS, functools.partial)",
        "_BY_CONTENT = CONTAINERS",
        "test_external_state.py::test_changed_afterwards[ByPartial]",
    ),
    _fault(
        "classes: of the unit", "class_swap", "        if reason := replaced(methods):", "        if False:",
        "test_patched_classes.py::test_methods_replaced_on_a_class[unit]",
    ),
    _fault(
        "classes: properties", "program", "if is_of_the_class(read) and read.path in kinds", "if False",
        "test_patched_classes.py::test_property_replaced_on_a_class",
    ),
    _fault(
        "classes: pickled after a change", "class_swap", "if replaced(self.methods) else None", "if False else None",
        "test_patched_classes.py::test_a_copy_that_is_pickled_while_a_method_is_replaced",
    ),
    _fault(
        "classes: super() of the own class", "classes",
        'first == "super" and (second == "type" or third == "__class__")', "False",
        "test_patched_classes.py::test_super_of_the_instances_class[SuperOfClass-0]",
    ),
    _fault(
        "classes: super() of the own type", "classes", '(second == "type" or third == "__class__")',
        'third == "__class__"', "test_patched_classes.py::test_super_of_the_instances_class[SuperOfType-0]",
    ),
    _fault(
        "classes: metaclasses are told", "classes", "make.__new__(type(kind), ", "type(kind)(",
        "test_patched_classes.py::test_registries_of_subclasses_see_nothing[ByMeta]",
    ),
    _fault(
        "classes: __init_subclass__ is told", "class_swap", 'if "_rir_fusion" not in vars(cls):', "if True:",
        "test_patched_classes.py::test_registries_of_subclasses_see_nothing[BySubclass]",
    ),
    _fault(
        "classes: copies made by the fused one", "class_swap",
        "recipe.original if part is type(self) else part", "part",
        "test_patched_classes.py::test_classes_that_say_how_they_are_copied[pickle-Reduced]",
    ),
]  # fmt: skip
CALLS = [
    _fault(
        "one by one: out of place", "program",
        'options | {"one_by_one": graph.call_function(getattr, (root, one_by_one))}', "dict(options)",
        "test_fallback.py::test_sums_of_other_dtypes_and_shapes[added_in_place]",
    ),
    _fault(
        "one by one: dtypes of residuals", "runtime", "all(r.dtype == x.dtype for r in residuals)", "True",
        "test_fusion_status.py::test_calls_that_cannot_be_one_operation[another dtype]",
    ),
    Mutant(
        "one by one: errors are those of the fused operation", "rir_kernels/dispatch/operation.py",
        "if otherwise is None:", "if True:", (f"{TRUTH}/test_fallback.py::test_inputs_that_are_refused[True-plain]",),
    ),
    _fault(
        "one by one: numbers that torch reads", "bypass", "if isinstance(norm.eps, float | int) else", "if True else",
        "test_fallback.py::test_numbers_of_other_types[eps, tensor]",
    ),
    _fault(
        "one by one: tensors before parameters", "bypass", "if name in parameters and name not in module.__dict__:",
        "if name in parameters:", "test_fallback.py::test_weights_that_are_not_parameters[shadowed-False]",
    ),
    _fault(
        "one by one: padding with a stride", "bypass", "if dilation is None or pair(conv.stride) != (1, 1):",
        "if dilation is None:", "test_fallback.py::test_modules_that_do_not_fit_each_other",
    ),
    _fault(
        "calls: hooks on all modules", "bypass", "if _has_any_global_hook():", "if False:",
        "test_fallback.py::test_a_hook_on_all_modules",
    ),
    _fault(
        "calls: other arguments", "program", "_OTHER_ARGUMENTS if others else call_obstacle(*given)",
        "call_obstacle(*given)", "test_fallback.py::test_other_arguments",
    ),
    Mutant(
        "statistics: another version", "rir_kernels/common/running_statistics.py",
        "statistics.data if is_plain_eager() else", "",
        (f"{TRUTH}/test_aliases.py::test_norm_called_elsewhere_keeps_its_backward",),
    ),
]  # fmt: skip
WATCH = [
    _fault(
        "watch: containers not put back", "watch", "changed = self.kept.restore()", "changed = False",
        "test_tracing_side_effects.py::test_nothing_is_left[True-appends]",
    ),
    _fault(
        "watch: names not put back", "watch", "_put_back(walk(start, steps[:-1]), steps[-1], value)", "pass",
        "test_tracing_side_effects.py::test_nothing_is_left[True-sets_a_global]",
    ),
    _fault(
        "watch: what changes is fused", "watch", "if changed and kind is None:", "if False:",
        "test_tracing_side_effects.py::test_nothing_is_left[True-appends]",
    ),
    _fault(
        "watch: containers within others", "outside", "self.keep(one)", "pass",
        "test_tracing_side_effects.py::test_nothing_is_left[True-to_a_nested_global]",
    ),
    _fault(
        "watch: garbage is collected", "watch", "gc.disable()", "gc.isenabled()",
        "test_tracing_side_effects.py::test_garbage_collection_and_weak_references_are_not_the_forwards",
    ),
    _fault(
        "watch: weak references tell", "watch", " or _is_told_of_a_death(frame)", "",
        "test_tracing_side_effects.py::test_garbage_collection_and_weak_references_are_not_the_forwards",
    ),
    _fault(
        "watch: garbage is never collected again", "watch", "gc.enable()", "pass",
        "test_tracing_side_effects.py::test_garbage_collection_and_weak_references_are_not_the_forwards",
    ),
    _fault(
        "watch: a profiler is ended", "watch", "if self.previous is not None:", "if False:",
        "test_external_state.py::test_a_profiler_goes_on",
    ),
]  # fmt: skip
REUSE = [
    _fault(
        "reuse: what was read is not compared", "tracing", "and found == answers(module, trace.reads)", "",
        "test_trace_reuse.py::test_one_differs[other kind of number]",
    ),
    _fault(
        "reuse: how a module is built is not compared", "tracing", "same = built == alike and", "same =",
        "test_trace_reuse.py::test_one_differs[shared child]",
    ),
    _fault(
        "reuse: an integer is a float", "reuse", "        return type(value), value\n", "        return value\n",
        "test_trace_reuse.py::test_equal_numbers_of_another_type",
    ),
    _fault(
        "reuse: of what knows which module it is", "tracing", "None if serves_others(trace, module) else module",
        "None", "test_trace_reuse.py::test_table_of_modules",
    ),
    _fault(
        "recording: classes are not restored", "recording", 'type.__delattr__(kind, "__getattribute__")', "pass",
        "test_recording.py::test_restored_after_an_interruption",
    ),
    _fault(
        "recording: a forward may fuse", "recording", "if threading.get_ident() in _tracers:", "if False:",
        "test_recording.py::test_fused_within_a_forward",
    ),
    _fault(
        "recording: a look-up of others", "recording",
        "if kind.__getattribute__ not in (object.__getattribute__, _look_up):", "if False:",
        "test_recording.py::test_class_with_its_own_getattribute",
    ),
]  # fmt: skip
SEEN = [
    _fault(
        "coverage: what no forward uses", "coverage", "or is_norm(module) or self._hides_convolutions(module):",
        "or self._hides_convolutions(module):", "test_coverage.py::test_entries",
    ),
    _fault(
        "coverage: frozen norms", "coverage",
        "return all(tensor is not None and tensor.dim() == 1 for tensor in tensors)", "return False",
        "test_coverage.py::test_folding_reports_frozen_norms",
    ),
    _fault(
        "status: says that all is well", "status", "OperationStatus(name, pattern, not reason, reason)",
        'OperationStatus(name, pattern, True, "")', "test_fusion_status.py::test_status_is_what_a_call_does",
    ),
    _fault(
        "status: nobody is warned", "fallback", "if not any(text in reason for text in _KNOWN_TO_THE_OWNER):",
        "if False:", "test_fusion_status.py::test_globals_and_closures_by_name",
    ),
    _fault(
        "one by one: a ReLU that is gone", "runtime", "(acts if act is None else not isinstance(act, str | tuple))",
        "act is not None and not isinstance(act, str | tuple)", "test_fallback.py::test_missing_child",
    ),
]  # fmt: skip
FOLD = [
    _use("second calls", "uses", "if seen.called[part] > own:", "if False:", "ConvAgain"),
    _use("several names", "uses", "len(self.places[id(part)]) > 1:", "len(self.places[id(part)]) > 9:", "SharedBias"),
    _use("parameters of the convolution read", "uses", "if name in _CHANGED]", "if False]", "BiasRead"),
    _use(
        "parameters of the norm read", "uses", "for name in seen.asked.get(pair.norm, ())]", "for name in ()]",
        "GammaRead",
    ),
    _use(
        "other norms in its place", "uses", "for module in pair.forwards if pair.conv is not None else ():",
        "for module in ():", "NormByAttribute",
    ),
    _use(
        "hooks", "uses", "for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):",
        "for hook in ():", "hooked",
    ),
    _use("what code holds", "uses", "if any(id(one) in targets for one in held):", "if False:", "hooked_by_closure"),
    _use("classes asked", "uses", "if pair.norm in self.norms_asked_for(module):", "if False:", "TypeAsked"),
    _use(
        "names that lead to all", "reach", "reaches = name in names or name in _TRAVERSE or name in _CHILDREN",
        "reaches = name in names", "UntracedTraversal",
    ),
    _use("items of a container", "reach", "if value is not None and not load.to_call and", "if False and", "Taps"),
    _use(
        "what is called by code", "reach",
        "queue += [(f, module) for f in (methods[:1] if load.owner is module else methods)]", "pass", "Untraced",
    ),
    _use(
        "optional arguments", "patterns/fx_traced",
        "folds = [one if one in also else _with_other_arguments(one) for one in folds]", "pass", "RawByArgument",
    ),
]  # fmt: skip

SURGERY_FAULTS = [*EFFECTS, *READS, *OUTSIDE, *CLASSES, *CALLS, *WATCH, *REUSE, *SEEN, *FOLD]
