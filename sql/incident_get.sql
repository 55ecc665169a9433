-- One incident and its entity tag; all null when there is no such incident.
-- unchanged: If-None-Match (RFC 9110, 13.1.2) has this tag, weak or not.
--   $1 incident_id    bigint
--   $2 if_none_match  text    the header, null for none
SELECT body::json, etag,
       etag IS NOT NULL AND $2 = '*'
       OR etag = ANY (regexp_split_to_array(replace($2, 'W/', ''), '\s*,\s*')) AS unchanged
  FROM (SELECT) AS once
       LEFT JOIN (
       SELECT incident_json(incidents) AS body, format('"%s"', version) AS etag
         FROM incidents
        WHERE id = $1) AS incident ON true;
