"""What veRL lacks to run on a CPU: a platform, an engine and a rollout, registered and not patched.

For tests and small demonstrations alone. Load the platform first, in every process:

    VERL_USE_EXTERNAL_MODULES=examples.verl.on_cpu.platform VERL_PLATFORM=cpu python -m verl.trainer.main_ppo ...

and the engine and the rollout through the model's external libraries:

    actor_rollout_ref.model.external_lib=[examples.verl.on_cpu.engine,examples.verl.on_cpu.rollout]
"""
