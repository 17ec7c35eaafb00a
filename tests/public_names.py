"""The public names of every public module, and what a module needs beside the core: a change of
surface is made here.

``docs/compatibility.md`` says what being public promises. ``test_public.py`` and the smoke test of
the distributions compare this table with the package.
"""

PUBLIC = {
    "sj_robust": (
        "DLIFNode MPPDMonitor SpikingClassifier __version__ compare_potentials evaluate "
        "finetune perturbation_gains replace_neurons verify"
    ),
    "sj_robust.attacks": (
        "Attack SampleSeeds ThreatModel apgd autoattack count_flips count_moves "
        "external fgsm flip_events gaussian move_events pgd random_flips random_moves rfgsm "
        "salt_and_pepper sapgd spike_search square transfer uniform"
    ),
    "sj_robust.estimators": "ESTIMATORS estimator",
    "sj_robust.classifier": "PoissonEncoder SpikingClassifier SpikingEventClassifier",
    "sj_robust.data": (
        "Augmentation CIFAR_STATISTICS ImageSplits ShuffledBatches image_loader load_images"
    ),
    "sj_robust.defences": (
        "ClippedReLU EvolvingLeakNode FrequencyEncoder HomeostaticNode NoisyLIFNode "
        "OrthogonalEncoder SmoothingEncoder StochasticGate SurrogateOverlap deflate_"
    ),
    "sj_robust.doctor": "report",
    "sj_robust.evaluation": (
        "Corruption EstimatorSearch Fault Member Report compare_reports diagnose evaluate faulty "
        "firing from_checkpoint gallery make_suite search_estimators smoothed_bracket stress "
        "worst_case"
    ),
    "sj_robust.models": (
        "ConvChain FullyConnected NetworkSpec VGG WideResNet build_classifier build_network "
        "load_published_checkpoint pretrained pretrained_networks set_time_steps start_from "
        "zoo_networks"
    ),
    "sj_robust.neuron": "DLIFNode Stage dlif_to_lif fuse replace_neurons unfuse",
    "sj_robust.ops": "Surrogate available_backends dlif_multi_step keep_heap",
    "sj_robust.perturbation": (
        "IntensityCorrelation MPPDMonitor compare_potentials intensity_correlation "
        "membrane_potential ms_mppd simplified_perturbation spike_traces tasad"
    ),
    "sj_robust.proofs.gains": (
        "Certificate gain_penalty input_maps l2_gain l2_gain_limit optimal_input_gain peak_gain "
        "perturbation_gains printed_gain"
    ),
    "sj_robust.proofs": "SmoothedClassifier UnsoundBoundsError no_flip_radius smooth verify",
    "sj_robust.training": (
        "CertifiedOptions ForwardPasses GradientSparsity Journal MODES NonFiniteLossError "
        "Objective Penalty StabilityGain TemporalOrthogonality ThresholdGuarding "
        "TrainingInterrupted TrainingPlan WeightMagnitude convert event_attacks finetune "
        "load_checkpoint retract_ save_checkpoint train training_attack validation_attacks"
    ),
}
PUBLIC = {module: tuple(names.split()) for module, names in PUBLIC.items()}

NEEDS_RECIPES = {
    "sj_robust.training",
}
"""Modules that need the extra ``recipes``; the others import with what the package itself depends
on.
"""
