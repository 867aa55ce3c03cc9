# SPDX-License-Identifier: Apache-2.0
"""A fleet of real hosts on one machine, and the upstreams that it talks to.

Hosts (hosts.py) are systemd-nspawn machines: systemd as PID 1 and sshd on an overlay of one
Debian root file system (rootfs.py), each in its own network namespace behind one bridge
(network.py). They have no route beyond the bridge, like an air-gapped site. What they and the
controller fetch from is served at the bridge's address by small processes (upstreams.py): a git
repository of vLLM with a stand-in pull request (standin.py, source.py), a hub that speaks to
the unmodified huggingface_hub client (hub.py) and serves a small random model (model.py), and a
Debian repository of what a node may install. The GPUs are simulated: node/nvidia-smi answers
from a state file that `python3 -m lab gpu` edits (gpu.py).

Nothing depends on state files: every process carries a marker in its environment, and every
namespace, link and mount a prefix, so `down` finds what an aborted `up` left. Expensive things
(root file system, wheels, git repository, model) are built under a temporary name and renamed
into /var/cache/glm-fleet-lab, named by what went into them; `down` keeps that cache.
"""
