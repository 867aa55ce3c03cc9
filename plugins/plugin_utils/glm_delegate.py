# SPDX-License-Identifier: Apache-2.0
"""Modules that one task runs on several hosts, each as a task with ``delegate_to`` would.

A task delegates to one host. What has to ask its node and every gateway in an order that
depends on their answers would need a task a question, with the order written as conditions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ansible import constants
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.loader import action_loader, become_loader, connection_loader
from ansible.template import Templar
from glm_action import FleetAction

Result = dict[str, Any]


class DelegatingAction(FleetAction):
    """Runs modules on the host of the task and on others, one after the other."""

    def ask(
        self, host: str, module: str, arguments: Mapping[str, Any], own: dict[str, Any]
    ) -> Result:
        """Run a module on a host and return its result; ``own`` are the variables of the task.

        A host that cannot be reached is a result too, {unreachable, msg}, as is a failure,
        {failed, msg}: what that means is for the caller to say.
        """
        task = self._task.copy()
        task.action, task.args = module, dict(arguments)
        known = action_loader.has_plugin(module)
        try:
            connection, templar, variables = self._way_to(host, task, own)
            handler = action_loader.get(
                module if known else "ansible.legacy.normal",
                task=task,
                connection=connection,
                play_context=connection._play_context,
                loader=self._loader,
                templar=templar,
                shared_loader_obj=self._shared_loader_obj,
            )
            try:
                result: Result = handler.run(task_vars=variables)
            finally:
                handler.cleanup()
                if connection is not self._connection:
                    connection.close()
        except AnsibleConnectionFailure as error:
            return {"unreachable": True, "msg": str(error)}
        except AnsibleError as error:
            return {"failed": True, "msg": str(error)}
        return result

    def _way_to(
        self, host: str, task: Any, own: dict[str, Any]
    ) -> tuple[Any, Templar, dict[str, Any]]:
        """Return connection, templar and variables of a host."""
        if host == own["inventory_hostname"]:
            return self._connection, self._templar, own
        hostvars = own["hostvars"]
        # The raw variables, as Ansible takes them: of all others none is templated.
        variables = {**hostvars.raw_get(host), "hostvars": hostvars}
        templar = self._templar.copy_with_new_env(available_variables=variables)
        context = self._play_context.copy()
        # What the host's own variables do not say must not be left over from this node.
        context.remote_addr = host
        context = context.set_task_and_variable_override(
            task=task, variables=variables, templar=templar
        )
        return self._connect(task, context, variables, templar), templar, variables

    def _connect(
        self, task: Any, context: Any, variables: Mapping[str, Any], templar: Templar
    ) -> Any:
        """Make the connection that a task of the host would have."""

        def told(name: str, otherwise: Any) -> Any:
            value = variables.get(name)
            return otherwise if value is None else templar.template(value)

        connection = connection_loader.get(
            told("ansible_connection", task.connection),
            context,
            task_uuid=task._uuid,
            ansible_playbook_pid=str(os.getppid()),
        )
        become = None
        if boolean(told("ansible_become", task.become)):
            become = become_loader.get(told("ansible_become_method", task.become_method))
        connection.set_become_plugin(become)
        # The timeout of a task is not that of a connection, nor are its retries.
        keys = {**task.dump_attrs(), "timeout": context.timeout, "become_pass": context.become_pass}
        if context.password:
            keys["password"] = context.password
        keys = {name: value for name, value in keys.items() if name != "retries" and value != ""}
        for kind, plugin in (
            ("connection", connection),
            ("shell", connection._shell),
            ("become", become),
        ):
            if plugin is not None:
                names = constants.config.get_plugin_vars(kind, plugin._load_name)
                options = {name: told(name, None) for name in names if name in variables}
                plugin.set_options(task_keys=keys, var_options=options)
        return connection
