{{/* Name of the release's objects. */}}
{{- define "fedllm.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels by which an object's pods are found; arguments: root context, component. */}}
{{- define "fedllm.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "fedllm.labels" -}}
{{ include "fedllm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "fedllm.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "fedllm.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "fedllm.image" -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}

{{/* host:port of the SuperLink for nodes. */}}
{{- define "fedllm.superlink" -}}
{{- if .Values.node.superlink -}}
{{- .Values.node.superlink -}}
{{- else if .Values.superlink.enabled -}}
{{- printf "%s-superlink.%s.svc:%d" (include "fedllm.name" .) .Release.Namespace (int .Values.superlink.service.port) -}}
{{- else -}}
{{- fail "node.superlink is empty and superlink.enabled is false: set node.superlink to host:port of a SuperLink" -}}
{{- end -}}
{{- end -}}

{{- define "fedllm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "fedllm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Environment of both sides; arguments: root context, section of the values. */}}
{{- define "fedllm.env" -}}
- name: FEDLLM_LOG
  value: {{ .section.logFormat | quote }}
{{- range $name, $value := .section.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}
