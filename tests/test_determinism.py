"""The same seed gives the same bits in two processes, for each number of threads."""

import os
import subprocess
import sys

SCRIPT = """
import torch
import granq_plugin as gq
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.run_directory import fingerprint
from networks import teacher_network
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    teacher = teacher_network()
    student = gq.quantize(teacher, 3, 3)
    before = fingerprint(student)
    config = preset("cifar10", image_size=8, batch_size=64, epochs=2, iterations=4, warmup_epochs=1, student_lr=1e-2,
                    memory_size=64, replay_steps=1)
    result = zero_shot_qat(student, teacher, config)
    assert fingerprint(student) != before
    print(threads, fingerprint(student), fingerprint(result.generator), result.images.double().sum().item())
"""


def test_two_processes_leave_the_same_bits():
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="2")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (p.communicate()[0].splitlines() for p in processes)
    assert first == second and [line.split()[0] for line in first] == ["1", "2"]
