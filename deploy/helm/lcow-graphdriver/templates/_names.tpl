{{/* The name of all objects of a release. */}}
{{- define "lcow.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that never change, for selectors. */}}
{{- define "lcow.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lcow.labels" -}}
{{ include "lcow.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "lcow.image" -}}
{{ required "image.repository: name the image that was built from deploy/Dockerfile" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Arguments of containerd-config, as the script splits them. */}}
{{- define "lcow.arguments" -}}
{{- $arguments := list }}
{{- if .Values.containerd.default }}{{ $arguments = append $arguments "--default" }}{{ end }}
{{- if .Values.runtimeClass.create }}{{ $arguments = append $arguments (printf "--runtime=%s=io.containerd.runc.v2" .Values.runtimeClass.name) }}{{ end }}
{{- join " " (concat $arguments .Values.containerd.arguments) }}
{{- end }}
