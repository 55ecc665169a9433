-- Stop the service first. The triggers go with their functions.
SET lock_timeout = '3s';
DROP FUNCTION IF EXISTS set_first_times, copy_new_texts, copy_changed_text, refuse_timeline_change
    CASCADE;
DROP FUNCTION IF EXISTS rfc3339, incident_json, incident_csv, incident_line, timeline_json,
    timeline_line, join_lines, require_primary, incidents_between, incidents_of,
    incident_texts_between, search_form, contains_text, incident_matches, choose_search,
    merge_labels, follow_sender, changed_labels, claim_idempotency_keys;
