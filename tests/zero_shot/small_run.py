"""A small run in a process of its own, which test_recipe.py kills: python small_run.py RUN_DIR dynamic|static [--file-limit]."""

import resource
import signal
import sys
from pathlib import Path

import torch

import granq_plugin as gq
from granq_plugin.zero_shot import preset, zero_shot_qat
from networks import teacher_network

if __name__ == "__main__":
    folder, act = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = teacher_network()
    act_quant = gq.GranQActPerChannelStatic.let(learned_scale=True) if act == "static" else gq.GranQActPerChannel
    student = gq.quantize(teacher, 3, 3, act_quant=act_quant)
    beyond = dict(student_optimizer="adam", ema_decay=0.9) if act == "static" else {}
    config = preset(
        "cifar10", image_size=8, batch_size=8, epochs=12, iterations=5, warmup_epochs=1, student_lr=1e-2, checkpoint_every=3,
        memory_size=1000, replay_steps=1, **beyond)

    def on_iteration(done, log):
        print("iteration", done, flush=True)
        if "--file-limit" in sys.argv and done == 10:  # as on a full disk, writing more than now raises
            limit = (folder / "checkpoint.pt").stat().st_size + 1000
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = zero_shot_qat(student, teacher, config, run_dir=folder, resume=True, on_iteration=on_iteration)
    torch.save(dict(student=student.state_dict(), generator=result.generator.state_dict(), images=result.images,
                    metrics=result.metrics), folder / "result.pt")
