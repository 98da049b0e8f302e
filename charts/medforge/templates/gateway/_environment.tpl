{{/* The gateway's settings: the chart's own, then those of the values. */}}
{{- define "medforge.gatewayEnvironment" -}}
{{- $secret := .Values.gateway.existingSecret -}}
{{- $name := printf "%s-gateway" (include "medforge.fullname" .) -}}
- name: MEDFORGE_GATEWAY_ENVIRONMENT
  value: {{ .Values.gateway.environment }}
- name: MEDFORGE_GATEWAY_HOST
  value: "0.0.0.0"
- name: MEDFORGE_GATEWAY_PORT
  value: "8080"
- name: MEDFORGE_GATEWAY_DATA_DIR
  value: /data
- name: MEDFORGE_GATEWAY_ROUTING
  value: /etc/medforge/routing/routing.json
- name: MEDFORGE_GATEWAY_SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: secret-key}}
{{- if .Values.gateway.postgres }}
- name: MEDFORGE_GATEWAY_DATABASE
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: database-url}}
{{- end }}
{{- if .Values.gateway.redis }}
- name: MEDFORGE_GATEWAY_REDIS
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: redis-url}}
{{- end }}
{{- if .Values.gateway.upstreamKey }}
- name: MEDFORGE_GATEWAY_UPSTREAM_KEY
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: upstream-key}}
{{- end }}
{{- if .Values.gateway.referenceConfigMap }}
- name: MEDFORGE_GATEWAY_REFERENCE
  value: /etc/medforge/reference/reference.json
{{- end }}
{{- range $setting, $value := .Values.gateway.settings }}
{{- if eq $setting "allowed_hosts" }}
{{- /* `helm test` and other pods call the Service */ -}}
{{- $value = concat $value (list $name (printf "%s.%s.svc" $name $.Release.Namespace) (printf "%s.%s.svc.cluster.local" $name $.Release.Namespace)) | uniq }}
{{- end }}
- name: MEDFORGE_GATEWAY_{{ upper $setting }}
  value: {{ kindIs "slice" $value | ternary (toJson $value) (toString $value) | quote }}
{{- end }}
{{- end -}}
