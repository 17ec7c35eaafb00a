"""The public names of every public module, and what a module needs beside the core: a change of
surface is made here.

``docs/compatibility.md`` says what being public promises. ``test_public.py`` and the smoke test of
the distributions compare this table with the package.
"""

PUBLIC = {
    "sj_robust": (
        "DLIFNode MPPDMonitor SpikingClassifier __version__ compare_potentials evaluate "
        "perturbation_gains replace_neurons verify"
    ),
    "sj_robust.attacks": (
        "Attack AutoAttackWarning Moves SampleSeeds ThreatModel apgd autoattack check_frames "
        "check_images check_labels count_flips count_moves eps_text external fgsm flip_events "
        "gaussian linf_bounds move_events parse_eps pgd project_l2 project_linf random_flips "
        "random_moves rfgsm salt_and_pepper sapgd spike_search square transfer uniform"
    ),
    "sj_robust.estimators": "Applied ESTIMATORS Estimator estimator",
    "sj_robust.classifier": "Convention PoissonEncoder SpikingClassifier SpikingEventClassifier",
    "sj_robust.data": (
        "Augmentation CIFAR_STATISTICS DATASETS EVENT_DATASETS ImageSplits ShuffledBatches "
        "image_loader load_images"
    ),
    "sj_robust.doctor": "main report",
    "sj_robust.evaluation": (
        "CANDIDATES CORRUPTIONS Corruption EstimatorSearch FAULTS Fault Member Report Row Suite "
        "ThreatModel compare_reports craft diagnose evaluate faulty firing fools gallery "
        "make_suite search_estimators smoothed_bracket stress wilson_interval worst_case"
    ),
    "sj_robust.evaluation.subject": (
        "Subject check_fits describe_network from_checkpoint from_function"
    ),
    "sj_robust.models": (
        "ConvChain DirectlyEncoded FullyConnected MixedBlock NETWORKS NetworkSpec PretrainedCard "
        "SmallConvNet VGG VGG_FEATURES WIDE_RESNETS WideResNet build_classifier build_network "
        "build_zoo_network load_published_checkpoint pretrained pretrained_networks "
        "published_names set_time_steps start_from zoo_networks"
    ),
    "sj_robust.neuron": (
        "DLIFNode FusionReport ReplacementReport Stage dlif_to_lif fuse replace_neurons unfuse"
    ),
    "sj_robust.ops": (
        "BACKENDS Surrogate available_backends check_backend choose_backend dlif_multi_step "
        "keep_heap"
    ),
    "sj_robust.ops.bn_dlif": "BatchNorm batch_norm_dlif_multi_step can_fuse repeat_step",
    "sj_robust.perturbation": (
        "IntensityCorrelation LayerStats LayerTrace MPPDMonitor MPPDStatistics Perturbation "
        "Traces compare_potentials full_perturbation intensity_correlation membrane_potential "
        "ms_mppd neuron_indicators sample_indicators simplified_perturbation "
        "spike_train_distance tasad spike_traces"
    ),
    "sj_robust.perturbation.gains": (
        "Bound Certificate GainDesign INPUT InputMap LayerCertificate NeuronGains "
        "gain_penalty gain_scalars input_maps l2_gain l2_gain_limit neuron_gains "
        "optimal_input_gain peak_gain perturbation_gains printed_gain time_operator"
    ),
    "sj_robust.proofs": (
        "BoundedLayer SmoothedClassifier Smoothing UnsoundBoundsError Verification "
        "no_flip_radius smooth verify"
    ),
    "sj_robust.training": (
        "CertifiedLoss CertifiedOptions EpochRecord ForwardPasses GradientSparsity Journal "
        "Losses MODES Mode NonFiniteLossError Objective Penalty StabilityGain "
        "ThresholdGuarding TrainingInterrupted TrainingPlan WeightMagnitude "
        "catastrophic_overfitting check_start check_training final_attacks final_report "
        "first_process_first flip_attacks load_checkpoint make_accelerator make_penalties "
        "open_run_folder removed_if_unused project_to_simplex_ retract_ run_to_resume "
        "save_checkpoint train training_attack validation_attacks"
    ),
}
PUBLIC = {module: tuple(names.split()) for module, names in PUBLIC.items()}

NEEDS_RECIPES = {
    "sj_robust.training",
}
"""Modules that need the extra ``recipes``; the others import with what the package itself depends
on.
"""
